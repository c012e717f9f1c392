"""Emoji as a source of images: the list, what is held out, and how they are drawn."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import get_data_path
from PIL import ImageFont, features

import viar.data.emoji
import viar.data.sources
from viar.data import load_data
from viar.data.emoji import all_emoji, draw_emoji, emoji_groups, find_font

TONES = "\U0001f3fb-\U0001f3ff"
UNICODE = Path("/usr/share/unicode/emoji/emoji-test.txt")
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)


def has_font() -> bool:
    try:
        return bool(find_font())
    except ValueError:
        return False


needs_font = pytest.mark.skipif(not has_font(), reason="Noto Color Emoji is not installed")


def test_the_list_has_each_emoji_once_in_the_groups_of_unicode() -> None:
    listed = list(all_emoji())
    assert emoji_groups() == GROUPS
    assert len(listed) == len({text for text, _, _ in listed}) == 3655
    found = {text: GROUPS[group] for text, group, _ in listed}
    known = {"😀": 0, "👋🏽": 1, "🐈": 2, "🍕": 3, "🚲": 4, "🎃": 5, "🔑": 6, "#️⃣": 7, "🇩🇪": 8, "🏴󠁧󠁢󠁥󠁮󠁧󠁿": 8}
    assert {text: found[text] for text in known} == {text: GROUPS[group] for text, group in known.items()}


def test_skin_tones_of_one_emoji_share_a_line() -> None:
    lines = defaultdict[str, set[int]](set)
    for text, _, line in all_emoji():
        lines[re.sub(f"[{TONES}\ufe0f]", "", text)].add(line)
    assert all(len(places) == 1 for places in lines.values())
    # Of these a pair in two tones is written as a sequence of the two.
    pairs = {
        "🤝": "🫱🏻‍🫲🏿",
        "👭": "👩🏻‍🤝‍👩🏿",
        "👫": "👩🏻‍🤝‍👨🏿",
        "👬": "👨🏻‍🤝‍👨🏿",
        "💏": "🧑🏻‍❤️‍💋‍🧑🏿",
        "💑": "🧑🏻‍❤️‍🧑🏿",
    }
    line_of = {text: line for text, _, line in all_emoji()}
    assert all(line_of[one] == line_of[two] for one, two in pairs.items())


@pytest.mark.skipif(not UNICODE.is_file(), reason="Unicode's own list is not installed")
def test_the_list_is_that_of_unicode() -> None:
    text, wanted, group = UNICODE.read_text(), list[tuple[str, str]](), ""
    if "# Version: 15.0" not in text:
        pytest.skip("the list that is installed is of another version")
    for line in text.splitlines():
        group = line.removeprefix("# group: ") if line.startswith("# group: ") else group
        if "; fully-qualified" in line:
            wanted.append(("".join(chr(int(code, 16)) for code in line.partition(";")[0].split()), group))
    assert sorted(wanted) == sorted((one, GROUPS[group]) for one, group, _ in all_emoji())


def test_whole_lines_are_held_out_a_tenth_of_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = list(all_emoji())
    groups, lines = (torch.tensor([one[place] for one in listed]) for place in (1, 2))
    images = lines.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)  # a picture tells its line
    drawn = images, groups, lines, [viar.data.Skipped(Path("🫠"), "the font has no picture of")]
    monkeypatch.setattr(viar.data.sources, "draw_emoji", lambda font, side: drawn)
    monkeypatch.setattr(viar.data.sources, "find_font", lambda path: Path("font.ttf"))
    data, again = load_data("emoji", 64), load_data("emoji", 64)
    train, held = (set(part.images[:, 0, 0, 0].int().tolist()) for part in (data.train, data.validation))
    assert not train & held
    assert train | held == set(lines.tolist())
    assert again.validation.images.equal(data.validation.images)
    for group in range(9):
        total = len(set(lines[groups == group].tolist()))
        found = data.validation.images[data.validation.labels == group, 0, 0, 0]
        assert len(set(found.tolist())) == -(-total // 10)
    assert (data.num_classes, data.class_names) == (9, GROUPS)
    report = str(data.report)
    assert f"font.ttf: 9 classes, {len(data.train):,} pictures to learn from" in report
    assert "1 the font has no picture of: 🫠" in report


@pytest.mark.parametrize("path", ["", "nowhere.ttf"])
def test_a_font_that_is_not_there_is_named_with_the_way_to_get_it(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viar.data.emoji, "PLACES", (str(tmp_path),))
    source = f"emoji:{tmp_path / path}" if path else "emoji"
    with pytest.raises(
        ValueError, match=r"source: 'emoji' needs .*(nowhere|usual).*apt install.*brew.*conda"
    ):
        load_data(source, 64)


def test_a_file_that_is_no_such_font_and_a_side_that_is_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.ttf").write_text("no font")
    with pytest.raises(ValueError, match=r"source: .*a.ttf is no font with bitmaps"):
        load_data(f"emoji:{tmp_path / 'a.ttf'}", 64)
    with pytest.raises(ValueError, match=r"image_side: .* got 137"):
        load_data(f"emoji:{tmp_path / 'a.ttf'}", 137)
    some(monkeypatch, "❤️", "🫨")  # of which letters have one and not the other
    with pytest.raises(
        ValueError, match=r"source: .*DejaVuSans.ttf has no coloured bitmaps of emoji; on Deb"
    ):
        load_data(f"emoji:{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 64)


def some(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """Let these be all emoji there are."""
    listed = [(text, 0, line) for line, text in enumerate(texts)]
    monkeypatch.setattr(viar.data.emoji, "all_emoji", lambda: iter(listed))


@needs_font
@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no raqm")
def test_emoji_are_drawn_in_colour_on_white_and_each_picture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    some(monkeypatch, "❤️", "🇩🇪", "👩🏻‍🤝‍👨🏼", "👩🏿‍🤝‍👨🏼", "❤️😀", "\U0010fffe", "🇩🇪")
    images, groups, lines, skipped = draw_emoji(find_font(), 64)
    assert (images.shape, groups.tolist(), lines.tolist()) == ((4, 3, 64, 64), [0] * 4, [0, 1, 2, 3])
    assert (images[:, :, 0, 0] == 1).all()
    red, green, blue = images[0, :, 30, 32]
    assert red > 0.5 > -0.2 > max(green, blue)
    reasons = {(str(one.path), one.reason) for one in skipped}
    missing = "the font has no picture of"
    assert reasons == {("❤️😀", missing), ("\U0010fffe", missing), ("🇩🇪", "look like an earlier one")}
    small, *_ = draw_emoji(find_font(), 16)
    assert small.shape == (4, 3, 16, 16)
    shrunk = torch.nn.functional.avg_pool2d(images, 4)
    assert (shrunk - small).abs().mean() < 0.05


@needs_font
def test_without_its_library_sequences_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    some(monkeypatch, "😀", "🇩🇪", "👩🏻‍🤝‍👨🏼")
    truetype = ImageFont.truetype

    def basic(*given: Any) -> Any:
        return truetype(*given, layout_engine=ImageFont.Layout.BASIC)

    monkeypatch.setattr(ImageFont, "truetype", basic)
    monkeypatch.setattr(features, "check", lambda name: name != "raqm")
    images, _, _, skipped = draw_emoji(find_font(), 64)
    assert len(images) == 1
    assert {one.reason for one in skipped} == {"need a Pillow with the library raqm"}
    assert len(skipped) == 2
