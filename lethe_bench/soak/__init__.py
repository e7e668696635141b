"""Endurance: mixed traffic and control at one server for a long time, and a verdict on what it did to the server."""
