"""Long labels: grade-school problems with worked solutions, from reasoning-gym's gsm_symbolic."""
