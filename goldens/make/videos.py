"""Small videos and the frames that the peers take of them: DiffSynth-Studio's LoadVideo and LoadGIF, PIL for WebP and folders.

    pip install diffsynth==2.1.12 pillow==13.0.0 imageio==2.38.1 imageio-ffmpeg==0.8.1
    python videos.py FOLDER

Every NAME.EXT has its frames below each other in NAME.EXT.png. Those of a clip of 9 frames, scaled and cut to a width of 24 and
a height of 32, are in NAME.EXT.clip.png.
"""
import math
import os
import subprocess
import sys

import imageio_ffmpeg
from diffsynth.core.data.operators import ImageCropAndResize, LoadGIF, LoadImage, LoadVideo
from PIL import Image, ImageSequence

folder = sys.argv[1]
WIDTH, HEIGHT = 48, 32


def frame(at, mode="RGB"):
    """Smooth colours and a dot that moves, with a hole where the mode has transparency."""
    def pixel(x, y):
        colour = tuple(round(127 + 120 * math.sin((x + shift * y + 9 * at) / 17)) for shift in (1, 2, 3))
        near = math.hypot(x - 4 - 3 * at, y - 12)
        return (*colour, 0 if near < 5 else 255) if mode == "RGBA" else (250, 20, 20) if near < 5 else colour
    image = Image.new(mode, (WIDTH, HEIGHT))
    image.putdata([pixel(x, y) for y in range(HEIGHT) for x in range(WIDTH)])
    return image


def stack(frames, name):
    width, height = frames[0].size
    whole = Image.new("RGB", (width, height * len(frames)))
    for at, image in enumerate(frames):
        whole.paste(image, (0, at * height))
    whole.save(f"{folder}/{name}.png")


def save(name, count, mode="RGB", **options):
    frames = [frame(at, mode) for at in range(count)]
    frames[0].save(f"{folder}/{name}", save_all=True, append_images=frames[1:], loop=0, **options)


def ffmpeg(name, count, *options):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24",
               "-s", f"{WIDTH}x{HEIGHT}", "-r", "12.5", "-i", "-", *options, "-fflags", "+bitexact", f"{folder}/{name}"]
    subprocess.run(command, input=b"".join(frame(at).tobytes() for at in range(count)), check=True)


fit = ImageCropAndResize(height=32, width=24)
plain = dict(num_frames=1000, time_division_factor=1, time_division_remainder=0)
clip = dict(num_frames=9, frame_processor=fit)

save("opaque.gif", 7, duration=80)
# What one frame shows is taken away before the next.
save("holes.gif", 4, mode="RGBA", duration=80, disposal=2)
save("lossless.webp", 7, duration=80, lossless=True)
save("lossy.webp", 12, duration=80, quality=80)
save("holes.webp", 4, mode="RGBA", duration=80, lossless=True, exact=True)
ffmpeg("h264.mp4", 12, "-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p")
ffmpeg("vp9.webm", 7, "-c:v", "libvpx-vp9", "-crf", "12", "-pix_fmt", "yuv420p")
ffmpeg("mpeg4.avi", 7, "-c:v", "mpeg4", "-q:v", "2")
# A frame rate of each frame's own.
ffmpeg("uneven.mkv", 7, "-vf", "setpts='N*N/2/12.5/TB'", "-fps_mode", "vfr", "-c:v", "ffv1")
os.makedirs(f"{folder}/folder", exist_ok=True)
for at in range(6):
    frame(at).save(f"{folder}/folder/frame {at + 6}.png")

for name in ["opaque.gif", "holes.gif"]:
    stack(LoadGIF(**plain)(f"{folder}/{name}"), name)
stack(LoadGIF(**clip)(f"{folder}/opaque.gif"), "opaque.gif.clip")
for name in ["h264.mp4", "vp9.webm", "mpeg4.avi", "uneven.mkv"]:
    stack(LoadVideo(**plain)(f"{folder}/{name}"), name)
    stack(LoadVideo(**clip)(f"{folder}/{name}"), f"{name}.clip")
for name in ["lossless.webp", "lossy.webp", "holes.webp"]:
    with Image.open(f"{folder}/{name}") as animation:
        stack([image.convert("RGB") for image in ImageSequence.Iterator(animation)], name)
stack([LoadImage()(f"{folder}/folder/frame {at + 6}.png") for at in range(6)], "folder")
