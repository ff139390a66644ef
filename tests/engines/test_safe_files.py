"""Checkpoint files that would run code when they are read are refused unread."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from rairl_ray.engines.safe_files import refuse_foreign_code
from rairl_ray.errors import ResumeError


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_what_a_state_of_deepspeed_has_is_read(tmp_path: Path) -> None:
    state = {"stage": ZeroStageEnum.gradients, "scaler": LossScaler(scale=1.0), "values": torch.ones(3)}
    torch.save({"optimizer_state_dict": state, "rate": 1e-4}, tmp_path / "optim_states.pt")
    refuse_foreign_code(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_code_is_named_and_not_run(tmp_path: Path, zipped: bool) -> None:
    mark, file = tmp_path / "mark", tmp_path / "state" / "model_states.pt"
    file.parent.mkdir()
    if zipped:
        torch.save({"module": Hostile(mark)}, file)
    else:
        file.write_bytes(pickle.dumps({"module": Hostile(mark)}))
    with pytest.raises(ResumeError, match=r"posix\.mkdir|is no file that this program saved") as error:
        refuse_foreign_code(tmp_path)
    assert str(file) in str(error.value) and len(str(error.value).splitlines()) == 1 and not mark.exists()
    # the file was no empty threat
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert mark.exists()
