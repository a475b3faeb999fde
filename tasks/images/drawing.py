"""Images side by side, as a picture."""

import base64
import io

import torch
from torch import Tensor
from torch.nn.functional import pad

# Small images are enlarged, pixel by pixel, until they are so high.
_LEAST_HEIGHT = 40
_GAP = 4


def grid(images: Tensor, *, columns: int) -> Tensor:
    """Images in rows on white, each row from left to right.

    Args:
        images: (images, height, width, channels) uint8.
        columns: Images a row.

    Returns:
        (height, width, channels) uint8.
    """
    scale = -(-_LEAST_HEIGHT // images.shape[1])
    large = images.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    framed = pad(large, (0, 0, 0, _GAP, 0, _GAP), value=255)
    rows = [torch.cat(list(row), dim=1) for row in framed.split(columns)]
    rows[-1] = pad(rows[-1], (0, 0, 0, rows[0].shape[1] - rows[-1].shape[1]), value=255)
    return torch.cat(rows)[:-_GAP, :-_GAP]


def png(picture: Tensor) -> bytes:
    """A (height, width, channels) picture as a PNG file."""
    from PIL import Image

    pixels = picture[..., 0] if picture.shape[-1] == 1 else picture
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG", optimize=True)
    return file.getvalue()


def encoded(picture: Tensor) -> str:
    """A picture as base64 of its PNG file, as it stands in JSON and in pages."""
    return base64.b64encode(png(picture)).decode()
