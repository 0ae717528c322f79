"""From latents to use: edit them while a model runs, steer with them, and find out what they do to a
prediction."""

from monosemy.use import edit as edit
