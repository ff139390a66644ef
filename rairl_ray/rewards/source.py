"""Where a saved reward model is: a run folder, its final/reward_model, any copy of that, or a hub id."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rairl_ray.data.rows import is_hub_id
from rairl_ray.errors import ModelError
from rairl_ray.files import REWARD_FILE

BELOW = (".", "reward_model", "final/reward_model")
"""Where a reward model may lie in the folder that a user names."""


def reward_folder(source: str, output_dir: str = "runs", revision: str | None = None) -> Path:
    """The folder with `reward.json` that `source` names: a path, a run's name below `output_dir`, or a hub id.

    Raises:
        ModelError: no reward model there; the places that were looked at are named.
    """
    places = [Path(source).expanduser(), Path(output_dir) / source]
    for place in places:
        for below in BELOW:
            if (place / below / REWARD_FILE).is_file():
                return (place / below).resolve()
    if any(place.exists() for place in places) or not is_hub_id(source):
        looked = " and ".join(str(place) for place in places)
        raise ModelError(
            f"{source}: no reward model there: no {REWARD_FILE} in {looked}, nor in final/reward_model below; "
            "name a finished algorithm.type=airl run, its final/reward_model, or a hub id"
        )
    try:
        folder = Path(snapshot_download(source, revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{source}: no such folder, and no reward model on the hub: {reason}") from None
    if not (folder / REWARD_FILE).is_file():
        raise ModelError(f"{source}: the hub model has no {REWARD_FILE}; name a reward model of this project")
    return folder
