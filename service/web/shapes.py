"""The base of the shapes of bodies and documents."""

from pydantic import BaseModel


class Shape(BaseModel, defer_build=True):
    """Builds its validator at its first use, because most shapes stand in the documents alone."""
