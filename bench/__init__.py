"""Figures with their targets, and the anchors that they are held against. See docs/performance.md."""
