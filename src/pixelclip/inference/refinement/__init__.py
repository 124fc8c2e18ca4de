"""Refine class scores with the image: local affinities, propagation over a graph, votes within segments."""
