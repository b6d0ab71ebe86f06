"""The damping study: what thresholds on the damping of a trajectory tell, where the truth is known."""
