"""The photographs of a folder that are most like one of them: python folder_features.py MODEL FOLDER PHOTO [NEURONS]"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

import testreg


def main(
    name: str, folder: str, photo: str, neurons: str | None = None, file: str = "features.safetensors"
) -> list[tuple[float, str]]:
    loaded = testreg.load_model(name)  # timm:NAME, hf:NAME, a folder, ...
    testreg.patch(loaded.model, neurons)
    testreg.extract(loaded.model, folder, file, transform=loaded.transform, norm=True)  # run again, it goes on
    with safe_open(file, "pt") as features:
        names = json.loads(features.metadata()["images"])
        (patches,) = [each for each in features.keys() if each.startswith("patches.")]  # noqa: SIM118
        pooled = features.get_tensor(patches).mean((2, 3))  # (N, C): clean patches can be averaged
    query = pooled[names.index(str(Path(photo).relative_to(folder)))]
    likeness = torch.cosine_similarity(pooled, query[None])
    found = [(float(likeness[i]), names[i]) for i in likeness.argsort(descending=True)[:5]]
    for cosine, like in found:
        print(f"{cosine:.3f}  {like}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
