"""``farskip plan``: step time, exposed communication and memory of models at full size, predicted without the cluster."""
