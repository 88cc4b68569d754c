"""A IIIF service of small pictures, as institutions write its documents: Presentation and Image API 2 and 3."""

import io
import json
import re

import numpy as np
from PIL import Image

from tests.server import Server

V2, V3 = "http://iiif.io/api/presentation/2/context.json", "http://iiif.io/api/presentation/3/context.json"
IMAGE_2, IMAGE_3 = "http://iiif.io/api/image/2/context.json", "http://iiif.io/api/image/3/context.json"


def picture(number: int, width: int = 120, height: int = 90) -> Image.Image:
    """A pattern of its own for each number, the same at all sizes."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((width, height), 3)


class Institution:
    """Serves a collection of objects with one picture each, or more.

    Attributes:
        pictures: Numbers of the pictures of each object, by its name.
        form: 2 or 3, of both APIs.
        asked: Image requests, such as ``7/full/50,/0/default.jpg``.
    """

    def __init__(self, server: Server, pictures: dict[str, list[int]], form: int = 3) -> None:
        self.server, self.pictures, self.form = server, pictures, form
        self.asked: list[str] = []
        self.level, self.sides = 2, (120, 90)
        server.make = self.make

    @property
    def address(self) -> str:
        return f"{self.server.url}collection"

    def make(self, path: str) -> bytes | None:
        if path == "collection":
            return json.dumps(self.collection()).encode()
        if found := re.fullmatch(r"object/(\w+)", path):
            return json.dumps(self.manifest(found[1])).encode() if found[1] in self.pictures else None
        if found := re.fullmatch(r"image/(\d+)/info.json", path):
            return json.dumps(self.info(found[1])).encode()
        if found := re.fullmatch(r"image/((\d+)/full/(\d*),?(\d*)|.*(max|full))/0/default.jpg", path):
            return self.image(path)
        return None

    def image(self, path: str) -> bytes | None:
        found = re.fullmatch(r"image/(\d+)/full/(max|full|(\d*),(\d*))/0/default\.jpg", path)
        if found is None:
            return None
        self.asked.append(path.removeprefix("image/"))
        width, height = self.sides
        if found[3]:
            width, height = int(found[3]), int(found[4] or round(int(found[3]) * height / width))
        elif found[4]:
            width, height = round(int(found[4]) * width / height), int(found[4])
        content = io.BytesIO()
        picture(int(found[1]), width, height).save(content, "JPEG", quality=95)
        return content.getvalue()

    def info(self, number: str) -> dict[str, object]:
        base, (width, height) = f"{self.server.url}image/{number}", self.sides
        size = {"width": width, "height": height, "sizes": [{"width": 30, "height": 22}, {"width": 60, "height": 45}]}
        if self.form == 2:
            profile = [f"http://iiif.io/api/image/2/level{self.level}.json", {"formats": ["jpg"]}]
            return {
                "@context": IMAGE_2,
                "@id": base,
                "protocol": "http://iiif.io/api/image",
                "profile": profile,
                **size,
            }
        return {"@context": IMAGE_3, "id": base, "type": "ImageService3", "profile": f"level{self.level}", **size}

    def collection(self) -> dict[str, object]:
        addresses = [f"{self.server.url}object/{name}" for name in self.pictures]
        if self.form == 2:
            listed = [{"@id": each, "@type": "sc:Manifest", "label": "?"} for each in addresses]
            return {
                "@context": V2,
                "@id": self.address,
                "@type": "sc:Collection",
                "label": "Prints",
                "manifests": listed,
            }
        items = [{"id": each, "type": "Manifest", "label": {"en": ["?"]}} for each in addresses]
        return {"@context": V3, "id": self.address, "type": "Collection", "label": {"en": ["Prints"]}, "items": items}

    def manifest(self, name: str) -> dict[str, object]:
        address = f"{self.server.url}object/{name}"
        numbers = self.pictures[name]
        if self.form == 2:
            return {
                "@context": V2, "@id": address, "@type": "sc:Manifest", "label": f"Object {name}",
                "metadata": [{"label": "Artist", "value": ["Ann Painter"]}, {"label": "Date", "value": "1888"}],
                "license": "https://creativecommons.org/publicdomain/zero/1.0/",
                "related": {"@id": f"https://museum.example/{name}", "format": "text/html"},
                "sequences": [{"@type": "sc:Sequence", "canvases": [self.canvas_2(address, each) for each in numbers]}],
            }  # fmt: skip
        return {
            "@context": V3, "id": address, "type": "Manifest", "label": {"en": [f"Object {name}"], "de": ["Ding"]},
            "metadata": [
                {"label": {"en": ["Artist"], "de": ["Künstler"]}, "value": {"none": ["Ann Painter"]}},
                {"label": {"en": ["Date"]}, "value": {"en": ["1888"]}},
                {"label": {"en": ["Medium"]}, "value": {"en": ["<span>Oil on <b>canvas</b></span>"]}},
            ],
            "rights": "https://creativecommons.org/publicdomain/zero/1.0/",
            "homepage": [{"id": f"https://museum.example/{name}", "type": "Text", "label": {"en": ["page"]}}],
            "items": [self.canvas_3(address, each) for each in numbers],
        }  # fmt: skip

    def canvas_2(self, manifest: str, number: int) -> dict[str, object]:
        service = {"@context": IMAGE_2, "@id": f"{self.server.url}image/{number}", "profile": f"level{self.level}"}
        resource = {"@id": f"{self.server.url}image/{number}/full/full/0/default.jpg", "@type": "dctypes:Image",
                    "service": service}  # fmt: skip
        image = {"@type": "oa:Annotation", "motivation": "sc:painting", "resource": resource}
        return {"@id": f"{manifest}/canvas/{number}", "@type": "sc:Canvas", "label": f"p. {number}", "images": [image]}

    def canvas_3(self, manifest: str, number: int) -> dict[str, object]:
        base = f"{self.server.url}image/{number}"
        service = [{"id": base, "type": "ImageService3", "profile": f"level{self.level}"}]
        body = {"id": f"{base}/full/max/0/default.jpg", "type": "Image", "format": "image/jpeg", "service": service}
        note = {"id": f"{manifest}/note/{number}", "type": "Annotation", "motivation": "painting", "body": body,
                "target": f"{manifest}/canvas/{number}"}  # fmt: skip
        page = {"id": f"{manifest}/page/{number}", "type": "AnnotationPage", "items": [note]}
        canvas = {"id": f"{manifest}/canvas/{number}", "type": "Canvas", "label": {"none": [f"p. {number}"]}}
        return {**canvas, "height": 90, "width": 120, "items": [page]}
