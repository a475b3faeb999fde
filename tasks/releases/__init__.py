"""New releases of source models: where they are found, what remembers them, and the checkout each is worked on in."""
