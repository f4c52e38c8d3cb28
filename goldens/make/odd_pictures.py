"""Pictures that readers disagree on, and what PIL makes of them: `Image.open(path).convert("RGB")`, as DiffSynth-Studio reads.

    pip install pillow==13.0.0
    python odd_pictures.py FOLDER
"""
import sys

from PIL import Image

folder = sys.argv[1]


def waves(shift):
    """Smooth colours, so that jpeg decoders may differ by little alone."""
    picture = Image.new("RGB", (16, 24))
    picture.putdata([(8 * (x + y), 255 - 9 * y, (16 * x + shift) % 256) for y in range(24) for x in range(16)])
    return picture


turned = Image.Exif()
turned[0x0112] = 6  # the camera was held upright: viewers turn it by 90 degrees
frames = [waves(0), waves(60)]
waves(0).convert("CMYK").save(f"{folder}/cmyk.jpg", quality=95)
waves(0).save(f"{folder}/turned.jpg", quality=95, subsampling=0, exif=turned)
waves(0).convert("L").save(f"{folder}/grey.jpg", quality=95)
waves(0).save(f"{folder}/progressive.jpg", quality=95, subsampling=0, progressive=True)
frames[0].save(f"{folder}/frames.webp", save_all=True, append_images=frames[1:], lossless=True)
frames[0].save(f"{folder}/frames.png", save_all=True, append_images=frames[1:])
for name in ["cmyk.jpg", "turned.jpg", "grey.jpg", "progressive.jpg", "frames.webp", "frames.png"]:
    Image.open(f"{folder}/{name}").convert("RGB").save(f"{folder}/{name}.rgb.png")
