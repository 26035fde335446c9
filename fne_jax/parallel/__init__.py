"""Devices and processes: the mesh, where arrays live on it, and how processes find each other."""
