"""ENTRA inside the engines that people already run: one file for each, which loads its engine when it is first used."""
