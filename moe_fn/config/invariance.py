"""What batch_invariant=True goes together with: options by which tokens act on one another are refused."""

from moe_fn.config.parallel import ParallelConfig
from moe_fn.config.quant import QuantConfig
from moe_fn.config.router import RouterConfig

_WHERE = "MoEConfig.batch_invariant=True with"


def check_batch_invariant(router: RouterConfig, quant: QuantConfig | None, parallel: ParallelConfig | None) -> None:
    """ValueError for an option that makes a token's output depend on other tokens, or on a library's choice
    of kernels.
    """
    if router.capacity is not None:
        raise ValueError(
            f"{_WHERE} router.capacity={router.capacity}: expected None, for the first tokens of a sequence get the "
            "places"
        )
    if router.renormalize_order not in (1.0, 2.0):
        raise ValueError(
            f"{_WHERE} router.renormalize_order={router.renormalize_order}: expected 1.0 or 2.0, whose norms need no "
            "powers"
        )
    if quant is not None and quant.rounds_by_call:
        raise ValueError(
            f"{_WHERE} quant.activations of granularity 'tensor', not static: "
            "expected 'token', for one scale is the batch's"
        )
    if parallel is None:
        return
    if parallel.capacity is not None:
        raise ValueError(
            f"{_WHERE} parallel.capacity={parallel.capacity}: expected None, for who is dropped depends on the others"
        )
    for name, group in (("ep", parallel.ep), ("tp", parallel.tp), ("dp", parallel.dp)):
        exchanged = name != "tp" and parallel.dispatch in ("all_to_all", "all_to_all_static")
        if group is not None and group.size > 2 and not group.ordered and not exchanged:
            raise ValueError(
                f"{_WHERE} parallel.{name} of {group.size} ranks, dispatch={parallel.dispatch!r}: "
                "expected RankGroup.ordered=True, "
                "for collectives add up more than two in an order that depends on the place in the tensor"
            )
