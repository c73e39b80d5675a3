"""Is the estimate right? The true effect of removing units, and how estimates agree with it."""
