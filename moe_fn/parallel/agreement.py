"""Agreement of ranks: check_ranks_agree compares config, weights and groups of all ranks before the first forward.

Without it, ranks that differ get wrong results or hang in a collective.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

from moe_fn.balance.meeting import differing_fields, format_ranks, meet
from moe_fn.balance.slots import fields_of_slots
from moe_fn.config import MoEConfig, RankGroup, as_activation
from moe_fn.records import WEIGHT_PATHS, MoEWeights, leaves_of_weights
from moe_fn.torch_compat import group_of_name
from moe_fn.weights.check import check_weights
from moe_fn.weights.spec import FIRST_SLICE_ONLY, fields_without

_ROLES = ("tp", "ep", "dp", "sp")
_ON_EVERY_RANK = fields_without("E", "I", "M")

# of one rank, plain JSON: fields {name: value}, members and coordinates {role: ...}, problems [messages]
Record = dict[str, Any]


def check_ranks_agree(
    config: MoEConfig, weights: MoEWeights | None = None, group: dist.ProcessGroup | None = None, timeout_s: float = 60
) -> None:
    """Compare config, weights and groups of all ranks at set-up: every rank returns, or every rank raises the same
    error.

    Must be the same on all ranks: every field of the config except a rank's own coordinates (names of groups and ranks
    in them; sizes and `ordered` of groups must be the same), the version of moe_fn, torch's major.minor, which weights
    are given, their dtypes and device type, the shapes of unsharded weights, and the expert of each physical slot. Must
    fit on each rank: weights to the config's shapes for this rank; the config's groups to torch.distributed's groups of
    those names (those of another run do not), and to the same groups on their other ranks.

    group      the ranks that are compared: those that run this layer, for instance one stage of a pipeline; None: all
    timeout_s  how long a rank waits for the others, from its own call

    Ranks exchange their records in the store of torch.distributed, not in a collective: this works alike for gloo and
    NCCL, does not wait for a device, and works whatever the ranks disagree on. Every rank must call it equally often;
    nothing in forward calls it. Without torch.distributed it only checks weights against the config.

    Raises ValueError on every rank that called: which fields differ, with the values and ranks ("num_experts is 8 on
    ranks 0, 1 and 6 on rank 2"), what does not fit on which rank, and which ranks did not call within timeout_s.

    Later failures, in forward and backward, are reported by torch.distributed. If a rank dies, the other ranks'
    collectives with it raise: with gloo RuntimeError ("Connection closed by peer" or "Connection reset by peer") within
    0.4 s, measured. If a rank hangs: RuntimeError ("Timed out waiting 3000ms for send operation to complete") after the
    timeout of the group, measured with 3 s: 3.2 to 3.6 s, in backward as in forward. NCCL has no such errors in Python:
    its watchdog ends the process after the timeout (torch's documentation; not measured). The timeout of the default
    group is that of `init_process_group(timeout=timedelta(...))`; its default is 30 minutes for gloo and 10 for NCCL.
    Groups of a DeviceMesh of several dimensions do NOT inherit it: theirs is 30 minutes (measured, torch 2.13). Make
    such groups with `new_group(ranks, timeout=...)` and the mesh with `DeviceMesh.from_group`. After such an error the
    groups are unusable; end the process and let torchrun start all ranks again.

    >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8)
    >>> check_ranks_agree(config)
    >>> check_ranks_agree(config, MoEWeights(gate_up=torch.zeros(4, 16, 8), down=torch.zeros(3, 8, 8)))
    Traceback (most recent call last):
    ValueError: check_ranks_agree: weights.down is (3, 8, 8); expected (num_experts, expert_hidden_size, intermediate_size) = (4, 8, 8)
    """  # noqa: E501
    if not isinstance(config, MoEConfig):
        # Raised on this rank alone: it has no record to publish, and the other ranks report it as missing.
        raise ValueError(f"check_ranks_agree: config is a {type(config).__name__}; expected MoEConfig")
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
        raise ValueError(f"check_ranks_agree: timeout_s is {timeout_s!r}; expected a number of seconds > 0")
    problems = _problems_of_weights(config, weights)
    if not dist.is_available() or not dist.is_initialized():
        if config.parallel is not None:
            problems.append(
                "config.parallel is given, and torch.distributed has no process group: "
                "expected init_process_group before"
            )
        if problems:
            raise ValueError(f"check_ranks_agree: {'; '.join(problems)}")
        return
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    mine = dist.get_rank()
    if mine not in ranks:
        raise ValueError(
            f"check_ranks_agree: rank {mine} called with a group of {format_ranks(ranks)}; "
            "expected a group that it is in"
        )
    members, problems_of_groups = _groups(config, ranks)
    record = {
        "fields": _fields(config, weights),
        "members": members,
        "coordinates": {role: _group_of_role(config, role).rank for role in members},
        "problems": problems + problems_of_groups,
    }
    answer = meet(
        ranks,
        mine,
        json.dumps(record),
        timeout_s,
        lambda texts: differences({r: json.loads(t) for r, t in texts.items()}),
    )
    if answer:
        raise ValueError(f"check_ranks_agree: {answer}")


def _group_of_role(config: MoEConfig, role: str) -> RankGroup:
    return cast(RankGroup, getattr(config.parallel, role))


def _problems_of_weights(config: MoEConfig, weights: MoEWeights | None) -> list[str]:
    """What does not fit in this rank's weights: returned, not raised, since it is part of the published record."""
    if weights is None:
        return []
    try:
        if isinstance(weights, MoEWeights):
            check_weights("check_ranks_agree", config, weights, weights.down)
        else:
            raise ValueError(f"weights is a {type(weights).__name__}; expected MoEWeights")
    except ValueError as error:
        return [str(error).removeprefix("check_ranks_agree: ")]
    return []


def _fields(config: MoEConfig, weights: MoEWeights | None) -> dict[str, Any]:
    """The values that must be the same on every rank, by their names in errors."""
    values = dataclasses.replace(config, activation=as_activation(config.activation)).to_dict()
    for role in _ROLES if values["parallel"] else ():
        of_group = values["parallel"][role]
        values["parallel"][role] = of_group and {name: of_group[name] for name in ("size", "ordered")}
    fields = dict(_flat("", values))
    fields["the version of moe_fn"] = sys.modules["moe_fn"].__version__  # the package itself imports this module
    fields["the version of torch"] = ".".join(torch.__version__.split(".")[:2])
    if not isinstance(weights, MoEWeights):
        return fields
    for path, leaf in zip(WEIGHT_PATHS, leaves_of_weights(weights), strict=True):
        if leaf is None or path in FIRST_SLICE_ONLY:
            continue
        name = "weights." + ".".join(path)
        fields[f"dtype of {name}"] = str(leaf.dtype)
        fields[f"device type of {name}"] = leaf.device.type
        if path[0] in _ON_EVERY_RANK:
            fields[f"shape of {name}"] = list(leaf.shape)
    if weights.router is not None and weights.router.logical_of_physical is not None:
        fields |= fields_of_slots("weights.router.logical_of_physical", weights.router.logical_of_physical)
    return fields


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else [(prefix + name, value)]
    return found


def _groups(config: MoEConfig, compared: Sequence[int]) -> tuple[dict[str, list[int]], list[str]]:
    """The global ranks of each of the config's groups, and what does not fit torch.distributed's group of that name."""
    members: dict[str, list[int]] = {}
    problems: list[str] = []
    for role in _ROLES:
        group: RankGroup | None = getattr(config.parallel, role, None)
        if group is None:
            continue
        name = f"ParallelConfig.{role}"
        try:
            found = group_of_name(group.name)
        except (RuntimeError, ValueError, KeyError):
            problems.append(
                f"{name} is a group named {group.name!r}, which torch.distributed does not have: "
                "a config of another run?"
            )
            continue
        if (group.size, group.rank) != (found.size(), found.rank()):
            problems.append(
                f"{name} has rank {group.rank} of {group.size}, and torch.distributed's group {group.name!r} has "
                f"rank {found.rank()} of {found.size()}: a config of another rank or run?"
            )
            continue
        members[role] = dist.get_process_group_ranks(found)
        outside = [rank for rank in members[role] if rank not in compared]
        if outside:
            problems.append(
                f"{name} has {format_ranks(outside)}, not among the {len(compared)} ranks that compare: "
                "expected a group with all"
            )
    return members, problems + _overlaps(members)


def _overlaps(members: dict[str, list[int]]) -> list[str]:
    """Groups that overlap wrongly: tp may share only the rank itself with ep or dp, and sp must be a subset of ep."""
    problems = [
        f"ParallelConfig.tp and .{role} have {format_ranks(both)} in common: expected no more than the rank itself"
        for role in ("ep", "dp")
        if len(both := sorted(set(members.get("tp", ())) & set(members.get(role, ())))) > 1
    ]
    if "sp" in members and not set(members["sp"]) <= set(members.get("ep", ())):
        problems.append(f"ParallelConfig.sp has {format_ranks(members['sp'])}: expected some of ep's")
    return problems


def differences(records: dict[int, Record]) -> list[str]:
    """A message for each disagreement between the ranks' records; empty where they agree."""
    found = [f"{format_ranks([rank])}: {problem}" for rank, record in records.items() for problem in record["problems"]]
    found += differing_fields({rank: record["fields"] for rank, record in records.items()})
    return found + [message for role in _ROLES for message in _of_role(records, role)]


def _of_role(records: dict[int, Record], role: str) -> list[str]:
    """A message for the first two ranks of a group that differ in its members, or in their coordinate across it.

    Ranks of tp must be the same rank of ep, and the other way round.
    """
    across = {"tp": "ep", "ep": "tp"}.get(role)
    for rank, record in records.items():
        ranks = record["members"].get(role, [])
        for other in filter(records.__contains__, ranks):
            theirs = records[other]["members"].get(role, ranks)
            if theirs != ranks:
                return [
                    f"ParallelConfig.{role} is {format_ranks(ranks)} on rank {rank} and {format_ranks(theirs)} on "
                    f"rank {other}"
                ]
            places = [records[r]["coordinates"].get(across) for r in (rank, other)]
            if None not in places and places[0] != places[1]:
                return [
                    f"ParallelConfig.{role} joins ranks {rank} and {other}, which are {places[0]} and {places[1]} in "
                    f"{across}"
                ]
    return []
