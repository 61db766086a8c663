"""Speed and student quality, measured; see README.md here. Never part of the tests or of the package."""
