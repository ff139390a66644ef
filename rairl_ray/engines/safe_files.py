"""Looks into a checkpoint's files before DeepSpeed unpickles them: a pickle can run any program."""

from __future__ import annotations

from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

from rairl_ray.errors import ResumeError

KNOWN = frozenset(
    {
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    }
)
"""What DeepSpeed's optimizer states name besides tensors and plain values; calling it does nothing else."""


def refuse_foreign_code(folder: Path) -> None:
    """Raise ResumeError where a saved file below `folder` names a function or class that no state of ours has.

    Nothing is unpickled for that: torch reads the names alone.
    """
    for file in sorted(folder.rglob("*.pt")):
        try:
            found = set(get_unsafe_globals_in_checkpoint(file)) - KNOWN
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise ResumeError(f"{file}: is no file that this program saved ({why}); it is not read") from error
        if found:
            raise ResumeError(
                f"{file}: would run {', '.join(sorted(found))} when it is read, which no checkpoint of this "
                "program needs; it comes from elsewhere or was changed, and is not read"
            )
