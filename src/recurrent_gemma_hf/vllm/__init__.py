"""RecurrentGemma, Griffin and Hawk on vLLM: the plugin that vLLM finds, and the model that it builds.

Nothing is imported here: vLLM loads plugin.py in each of its processes, and model.py only where it builds the model.
"""
