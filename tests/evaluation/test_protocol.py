"""Evaluation protocol: its description."""

from pixelclip.config import EvaluateConfig
from pixelclip.evaluation.protocol import describe_protocol, protocol_of


def test_description_hides_the_limit_of_a_resize_that_is_off():
    text = describe_protocol(protocol_of(EvaluateConfig(name="set", side=96, shortest_edge=0)))
    assert "shortest_edge 0" in text and "longest_edge" not in text
    text = describe_protocol(protocol_of(EvaluateConfig(name="set", side=96, shortest_edge=640, longest_edge=2560)))
    assert "shortest_edge 640, longest_edge 2560" in text and "name" not in text
