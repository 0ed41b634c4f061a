"""The verbs of ``farskip``, a file each: ``add(verbs)`` adds its options and says what runs."""
