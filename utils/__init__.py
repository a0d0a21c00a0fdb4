"""Small helpers without a sibling import: arguments, files, progress, palette."""
