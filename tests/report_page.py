"""Reading a report.html back: its elements, its figures and its cards."""
import json
from html.parser import HTMLParser
from types import SimpleNamespace


class Reader(HTMLParser):
    """Collects the elements of a page, the texts of its cells, and its blocks of JSON by id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.blocks, self.texts, self._open = [], [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = (tag, dict(attributes))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, text):
        tag, attributes = self._open or ("", {})
        if tag == "script" and attributes.get("type"):
            self.blocks[attributes["id"]] = self.blocks.get(attributes["id"], "") + text
        elif tag in ("td", "th"):
            self.cells[-1] += text
        elif tag not in ("script", "style"):
            self.texts.append(text)

    def handle_endtag(self, tag):
        self._open = None


def read_report(path):
    """.reader, .data (what the script needs at once), .cards: {image id: card}."""
    reader = Reader(path.read_text(encoding="utf-8"))
    data = json.loads(reader.blocks.pop("data"))
    cards = [card for number in range(len(reader.blocks)) for card in json.loads(reader.blocks[f"cards{number}"])]
    return SimpleNamespace(reader=reader, data=data, cards=dict(zip(data["images"]["id"], cards)), count=len(cards))
