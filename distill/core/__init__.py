"""The ground floor: recipes as text, specs, artifacts and runs on disk, errors. Imports no torch."""
