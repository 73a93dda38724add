"""Checks of batch_invariant=True: rejects options by which the output of a token depends on other tokens."""

from moe_fn.config.parallel import ParallelConfig
from moe_fn.config.quant import QuantConfig
from moe_fn.config.router import RouterConfig

_WHERE = "MoEConfig.batch_invariant=True with"


def check_batch_invariant(router: RouterConfig, quant: QuantConfig | None, parallel: ParallelConfig | None) -> None:
    """Raises ValueError for options by which a token's output depends on other tokens, or on the kernel that a library
    chooses.
    """
    if router.capacity is not None:
        raise ValueError(
            f"{_WHERE} router.capacity={router.capacity}: expected None, because a token's slots depend on the tokens "
            "before it"
        )
    if router.renormalize_order not in (1.0, 2.0):
        raise ValueError(
            f"{_WHERE} router.renormalize_order={router.renormalize_order}: expected 1.0 or 2.0, whose norms do "
            "not call pow"
        )
    if quant is not None and quant.rounds_by_call:
        raise ValueError(
            f"{_WHERE} quant.activations of granularity 'tensor', not static: "
            "expected 'token', because one scale for a call depends on all its tokens"
        )
    if parallel is None:
        return
    if parallel.capacity is not None:
        raise ValueError(
            f"{_WHERE} parallel.capacity={parallel.capacity}: expected None, because dropped slots depend on the other "
            "tokens"
        )
    for name, group in (("ep", parallel.ep), ("tp", parallel.tp), ("dp", parallel.dp)):
        exchanged = name != "tp" and parallel.row.by_slot
        if group is not None and group.size > 2 and not group.ordered and not exchanged:
            raise ValueError(
                f"{_WHERE} parallel.{name} of {group.size} ranks, dispatch={parallel.dispatch!r}: "
                "expected RankGroup.ordered=True, because collectives sum more than two ranks in an order that depends "
                "on the position in the tensor"
            )
