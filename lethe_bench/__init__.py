"""The laboratory: what a server does not need. It measures engines and servers from outside, and plans deployments.

The product never imports it.
"""
