"""The course's entrant: the image as the judge takes it, and what to write into course.toml."""
