"""Generated frames before and after a picture, which show what is hidden in it.

In the labeled frame, rectangles of noise hide a large part of the scene, and its labels say what is behind
them. The frames before and after it show the scene. So a network can label the hidden part only by the other
frames.
"""

import numpy as np

#: Share of the picture that is hidden, at least.
HIDDEN = 0.6
#: Smallest and largest side of a rectangle, relative to the height of the picture.
SIDES = (0.2, 0.5)
#: Frame numbers before and after that of the labeled picture, which is 19 as in Cityscapes.
NEIGHBORS = (-1, 1)


def hide(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Hide parts of a picture behind noise.

    Args:
        image: uint8 [h, w, 3].
        rng: random generator.

    Returns:
        The picture with the noise, and whether each pixel is hidden, bool [h, w]. It differs from `image` in
        exactly these pixels.
    """
    height, width = image.shape[:2]
    hidden = np.zeros((height, width), bool)
    while hidden.mean() < HIDDEN:
        sides = (rng.uniform(*SIDES, 2) * height).astype(int)
        top, left = (rng.integers(1 - side, end) for side, end in zip(sides, (height, width), strict=True))
        hidden[max(top, 0) : top + sides[0], max(left, 0) : left + sides[1]] = True
    noise = rng.integers(0, 256, image.shape, dtype=np.uint8)
    noise[(noise == image).all(2)] ^= 1
    return np.where(hidden[..., None], noise, image), hidden


def names(stem: str) -> tuple[str, ...]:
    """Return the stems of the frames around a picture, such as ulm_000000_000018 of ulm_000000_000019."""
    base, number = stem.rsplit("_", 1)
    return tuple(f"{base}_{int(number) + offset:0{len(number)}d}" for offset in NEIGHBORS)
