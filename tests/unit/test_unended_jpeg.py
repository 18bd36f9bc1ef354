"""A JPEG that lacks only its end marker counts as an image. A JPEG that lacks more does not."""

import io
from typing import Any

import pytest
from PIL import Image

from service.images.validated_image import ValidImage
from service.images.validator_child import END_OF_JPEG, check_image
from tests.downloads import noise


def patterned(size: tuple[int, int], mode: str = "RGB", **how: Any) -> bytes:
    """A JPEG of a gradient."""
    made = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(made, "JPEG", **how)
    return made.getvalue()


UNENDED = {
    "of noise": noise("JPEG", (200, 150)),
    "smooth": patterned((200, 150)),
    "of the best quality": patterned((99, 77), quality=100, subsampling=0),
    "optimised": patterned((333, 222), optimize=True, quality=20),
    "progressive": patterned((150, 120), progressive=True),
    "progressive noise": noise("JPEG", (120, 90), progressive=True),
    "with restart markers": noise("JPEG", (200, 150), restart_marker_blocks=4),
    "grey": patterned((64, 48), "L"),
    "cmyk": patterned((64, 48), "CMYK"),
    "of one pixel": patterned((1, 1)),
}


@pytest.mark.parametrize(
    "tail", [b"", b"\xff", b"\0" * 9, b"\r\n"], ids=["", "ff", "zeros", "line"]
)
@pytest.mark.parametrize("name", UNENDED)
def test_a_jpeg_without_its_end_marker_is_whole_if_it_decodes_whole(name: str, tail: bytes) -> None:
    assert UNENDED[name].endswith(END_OF_JPEG)
    verdict = check_image(UNENDED[name][:-2] + tail, 200_000)
    assert isinstance(verdict, ValidImage)
    assert verdict.media_type == "image/jpeg"


@pytest.mark.parametrize("name", sorted(UNENDED.keys() - {"of one pixel"}))
def test_a_jpeg_that_lacks_more_is_not_whole(name: str) -> None:
    """Bytes of its last scan are missing, a restart interval or whole scans. Only bytes without an
    effect on a pixel may be missing.
    """
    whole = UNENDED[name]

    def pixels(data: bytes) -> bytes:
        with Image.open(io.BytesIO(data + END_OF_JPEG)) as image:
            return image.tobytes()

    cuts = [*range(3, 180), len(whole) // 4, len(whole) // 2]
    valid = [cut for cut in cuts if isinstance(check_image(whole[:-cut], 200_000), ValidImage)]
    assert [cut for cut in valid if pixels(whole[:-cut] + bytes(64)) != pixels(whole)] == []
    assert len(valid) <= 3
