"""Registered versions in MLflow: what is in their folders, which one is the champion, and how it became that."""
