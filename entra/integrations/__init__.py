"""ENTRA's reward in the engines that people already run: one module an engine, which loads the engine where it is used."""
