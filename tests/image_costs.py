"""Validates pictures in a process of its own and prints the costs: `python -m tests.image_costs
bombs|broken|FOLDER MAX_PIXELS`.
"""

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from service.images.validated_image import ValidImage
from service.images.validator_child import FORMATS, check_image, media_type
from tests.pictures import bombs, broken, samples

BROKEN = 400  # pictures of each kind


def files(what: str) -> Iterator[tuple[str, bytes]]:
    if what == "bombs":
        yield from bombs().items()
    elif what == "broken":
        yield from (
            (str(number), data)
            for number, data in enumerate(broken(list(samples().values()), BROKEN))
        )
    else:
        yield from (
            (path.name, path.read_bytes())
            for path in sorted(Path(what).rglob("*"))
            if path.is_file()
        )


def memory(name: str) -> int:
    """Bytes of memory of this process, by a name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def main(what: str, max_pixels: int) -> None:
    for sample in samples().values():  # loads what the decoders keep in memory
        check_image(sample, max_pixels)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (1 << 30), resource.RLIM_INFINITY))
    wanted = list(files(what))
    peaks, seconds, said = dict[str, int](), dict[str, float](), dict[str, str]()
    kinds: Counter[str] = Counter()
    for name, data in wanted:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before, started = memory("VmRSS"), time.process_time()
        verdict = check_image(data, max_pixels)
        seconds[name], peaks[name] = (
            time.process_time() - started,
            memory("VmHWM") - before - 3 * len(data),
        )
        if isinstance(verdict, ValidImage):
            assert verdict.media_type in {media_type(format) for format in FORMATS}
            assert 0 < verdict.width * verdict.height <= max_pixels
            kinds[verdict.media_type] += 1
        else:
            said[name] = verdict.reason
    print(
        json.dumps(
            {
                "judged": len(wanted),
                "kinds": kinds,
                "peaks": peaks,
                "seconds": seconds,
                "said": said,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
