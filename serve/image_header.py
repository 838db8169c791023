"""What the first bytes of an upload say, read before any decoder sees them.

Which format a file has is decided by its magic bytes alone; names and content types are the caller's claim. Pillow
reads the headers of JPEG and PNG without decoding, but opening a WebP already allocates its whole canvas, and a
progressive JPEG of a few bytes a scan can keep a decoder busy for hours: both are looked at here first.
"""

from __future__ import annotations

FORMATS = ("JPEG", "PNG", "WEBP")
# A camera or a progressive encoder writes about ten. Each is a pass over all coefficients of the image.
MAX_JPEG_SCANS = 100
# Frame headers: SOF0 to SOF15 but for DHT, JPG and DAC, which lie among them. Before one come tables, Exif, a profile.
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_SEGMENTS = 64


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format that the magic bytes name; None where it is none of FORMATS."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that a WebP's first chunk claims; None where it is cut off or unknown.

    Layouts: RFC 9649 (VP8X, VP8L) and RFC 6386, 9.1 (VP8).
    """
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def claimed_pixels(data: bytes) -> int | None:
    """Pixels that an image's header claims, found in microseconds; None where it takes longer, or is no such image.

    Only good for turning away whoever cannot be served now: what is let in is looked at by Pillow.
    """
    form, size = sniff(data), None
    if form == "JPEG":
        size = _jpeg_size(data)
    elif form == "PNG" and len(data) >= 24:
        size = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])  # IHDR comes first
    elif form == "WEBP":
        size = webp_size(data)
    return None if size is None else size[0] * size[1]


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG's frame header (ITU-T T.81, B.2.2); None where it is not among the first segments."""
    at = 2
    for _ in range(JPEG_SEGMENTS):
        segment = data[at : at + 9]
        if len(segment) < 9 or segment[0] != 0xFF:
            return None
        if segment[1] in JPEG_FRAMES:
            return int.from_bytes(segment[7:9]), int.from_bytes(segment[5:7])
        at += 2 + int.from_bytes(segment[2:4])
    return None


def jpeg_scans(data: bytes) -> int:
    """Scans of a JPEG, counted by their marker: entropy-coded data never holds it. A thumbnail's count too."""
    return data.count(b"\xff\xda")
