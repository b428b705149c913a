"""Write vectors that are not there yet, with `python -m tests.unit.archive.make_vectors`. All others are frozen."""

from __future__ import annotations

from pathlib import Path

from tests.unit.archive.examples import vectors

DIRECTORY = Path(__file__).with_name("vectors")


def main() -> None:
    """Text as it is, everything else in lines of hexadecimal digits."""
    for name, data in vectors().items():
        path = DIRECTORY / (name if name.endswith(".json") else f"{name}.hex")
        if not path.exists():
            lines = [data[start : start + 32].hex() for start in range(0, len(data), 32)]
            path.write_text(data.decode() if name.endswith(".json") else "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
