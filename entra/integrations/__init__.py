"""ENTRA in the engines that people train with: one file an engine, imported only where its engine is used."""
