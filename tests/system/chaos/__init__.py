"""Kills, stops and cuts off parts of a run at chosen moments, and checks what trained in the weights that survive.

python -m tests.system.chaos --trials 40 --seed 0 [--redis]
"""
