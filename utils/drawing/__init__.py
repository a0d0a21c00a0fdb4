"""Pictures and charts: palettes, heat maps, curves, contact sheets, attention figures."""
