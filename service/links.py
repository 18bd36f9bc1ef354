"""Links to stored images. They are made when a document is shown."""

from dataclasses import dataclass

from service.ids import blob_name
from service.strict_json import JSON


@dataclass(frozen=True, slots=True)
class Links:
    """`image_base_url` serves the blob store under the same names. Without it, the service serves
    images.
    """

    base_url: str
    image_base_url: str | None = None

    def image(self, task_id: str, image: JSON) -> str:
        if self.image_base_url is None:
            return f"{self.base_url}/images/{image['id']}"
        blob = blob_name(task_id, image["index"], image["sha256"], image["media_type"])
        return f"{self.image_base_url}/{blob}"


def with_links(document: JSON, links: Links) -> JSON:
    """A task's document with links of its images, and with `results` if it is completed."""
    images = [{**image, "url": links.image(document["id"], image)} for image in document["images"]]
    results = [image["url"] for image in images] if document["state"] == "completed" else []
    return {**document, "images": images, "results": results}
