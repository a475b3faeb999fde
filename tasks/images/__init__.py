"""Image models: their calibration images, and what is measured of the images they write."""
