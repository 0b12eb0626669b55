"""Gates over experts: the lanes that they are told, their losses, their figures."""
