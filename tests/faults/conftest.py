"""Fixtures of the tests of faults; the undisturbed results are made once."""

from helpers import faults_stages

server, made = faults_stages.server, faults_stages.made
