"""A little general text of our own, for models that are shipped without any: enough to verify, too little to boast."""

from __future__ import annotations

__all__ = ["SAMPLE_TEXT"]

SAMPLE_TEXT: tuple[str, ...] = (
    "The ferry leaves the harbour at seven and reaches the island before the fog has lifted from the water.",
    "Nobody had touched the piano since the winter, yet every key still answered with a clear note.",
    "A small bakery on the corner sells rye bread, and by nine in the morning there is never a loaf left.",
    "Engineers replaced the old bridge in sections so that the trains could keep running through the summer.",
    "She wrote the letter twice, tore up the first one, and sent the second without reading it again.",
    "The battery lasts about six hours when the screen is dim and the radio is switched off.",
    "In dry years the river shrinks to a string of pools, and the herons gather where the fish are trapped.",
    "To restart the pump, close the valve, wait for the pressure to fall below two bar, and press the green button.",
    "The committee agreed on the budget but could not agree on who should present it to the council.",
    "Bees can tell the shapes of flowers apart and remember for days which of them held nectar.",
    "He had learned the language from films, so his questions were polite and his curses were perfect.",
    "The library closes early on Fridays; books can be returned through the slot beside the side entrance.",
    "Prices rose by three per cent in spring, mostly because of fuel and the cost of shipping.",
    "Add the flour slowly, stir until the dough is smooth, and let it rest for an hour under a damp cloth.",
    "From the top of the tower you can see the whole valley, the two churches, and the railway line between them.",
    "The patch fixes an error in the parser that made it accept dates such as the thirty-first of April.",
    "When the lights came back on, the audience was still sitting in silence, and then the applause began.",
    "Glaciers carry stones for thousands of years and drop them far from the mountains they were broken from.",
    "The driver apologised for the delay, which he said was caused by a fallen tree near the second tunnel.",
    "A good map leaves out almost everything, and what it keeps it draws too large.",
    "The recipe calls for saffron, but turmeric gives the same colour for a fraction of the price.",
    "Two of the three witnesses remembered a blue car; the third was certain that it had been a van.",
    "Children under six travel free if they share a seat with an adult who holds a valid ticket.",
    "The team lost its first four matches and then, to the surprise of its own supporters, won the next nine.",
    "Salt lowers the freezing point of water, which is why it is spread on roads before a cold night.",
    "Her grandfather kept every receipt in a shoe box, sorted by year, in case anybody should ever ask.",
    "The museum bought the painting at auction without knowing that a second one was hidden beneath it.",
    "Please send the signed form to the address below; applications without a signature cannot be processed.",
    "At night the desert is so quiet that you can hear the sand settle after the wind has dropped.",
    "The software update takes about ten minutes, during which the device must stay connected to power.",
    "Most of the town was rebuilt after the fire, but the market hall still has its original roof.",
    "He answered every question with another question, and by the end nobody knew who was being interviewed.",
)
"""Sentences written for edgestill; under its licence."""
