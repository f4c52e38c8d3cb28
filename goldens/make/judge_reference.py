"""MobileNetV2 features of the two pictures in goldens/judge, in float64, by an implementation that shares nothing with the Rust one.

    pip install numpy==2.4.6 safetensors==0.8.0 pillow==13.0.0
    python goldens/make/judge_reference.py

Convolutions are sums of shifted channel-first arrays, the resize follows the formula of torch's
`interpolate(mode="bilinear", align_corners=False, antialias=False)`.
"""
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
SIDE = 128
MEAN = np.array([0.485, 0.456, 0.406])
DEVIATION = np.array([0.229, 0.224, 0.225])
# (first, last) feature index of each stage and the stride of its first block: torchvision's inverted_residual_setting.
STAGES = [((1, 1), 1), ((2, 3), 2), ((4, 6), 2), ((7, 10), 2), ((11, 13), 1), ((14, 16), 2), ((17, 17), 1)]


def resize(picture):
    """[H, W, 3] u8 to [SIDE, SIDE, 3], bilinear between the four nearest pixel centres, edges repeated."""
    def axis(size):
        at = np.maximum((np.arange(SIDE) + 0.5) * size / SIDE - 0.5, 0.0)
        low = np.minimum(np.floor(at).astype(int), size - 1)
        return low, np.minimum(low + 1, size - 1), at - low

    (y0, y1, fy), (x0, x1, fx) = axis(picture.shape[0]), axis(picture.shape[1])
    fy, fx = fy[:, None, None], fx[None, :, None]
    p = picture.astype(np.float64)
    top = p[y0][:, x0] * (1 - fx) + p[y0][:, x1] * fx
    bottom = p[y1][:, x0] * (1 - fx) + p[y1][:, x1] * fx
    return top * (1 - fy) + bottom * fy


def conv(x, weight, bias, stride=1, relu6=True):
    """x [C, H, W]; weight [O, C, k, k], or [C, 1, 3, 3] for one filter per channel."""
    weight, bias = weight.astype(np.float64), bias.astype(np.float64)
    kernel, side = weight.shape[-1], x.shape[-1]
    padded = np.pad(x, ((0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
    out = 0.0
    for dy in range(kernel):
        for dx in range(kernel):
            window = padded[:, dy:dy + side:stride, dx:dx + side:stride]
            tap = weight[:, :, dy, dx]
            depthwise = weight.shape[1] == 1 and x.shape[0] > 1
            out = out + (window * tap[:, 0, None, None] if depthwise else np.einsum("oc,chw->ohw", tap, window))
    out = out + bias[:, None, None]
    return np.clip(out, 0.0, 6.0) if relu6 else out


def features(picture, weights):
    def layer(x, name, **options):
        return conv(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    x = ((resize(picture) / 255 - MEAN) / DEVIATION).transpose(2, 0, 1)
    x = layer(x, "features.0.0", stride=2)
    for (first, last), first_stride in STAGES:
        for index in range(first, last + 1):
            stride, name, hidden = first_stride if index == first else 1, f"features.{index}.conv", x
            if index > 1:
                hidden = layer(hidden, f"{name}.0.0")
            depthwise, project = (f"{name}.0.0", f"{name}.1") if index == 1 else (f"{name}.1.0", f"{name}.2")
            hidden = layer(layer(hidden, depthwise, stride=stride), project, relu6=False)
            x = x + hidden if hidden.shape == x.shape and stride == 1 else hidden
    return layer(x, "features.18.0").mean(axis=(1, 2))


def main():
    weights = load_file(ROOT / "assets/judge/mobilenet_v2_features_bnfold_f16.safetensors")
    folder = ROOT / "goldens/judge"
    pictures = {path.stem: np.array(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))}
    goldens = {name: features(picture, weights).astype(np.float32) for name, picture in pictures.items()}
    save_file(goldens, folder / "judge.safetensors")
    for name, values in goldens.items():
        print(f"{name}: {pictures[name].shape[1]}x{pictures[name].shape[0]}, mean {values.mean():.6f}, largest {values.max():.6f}")


if __name__ == "__main__":
    main()
