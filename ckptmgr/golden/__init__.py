"""Golden samples: raw inputs with what preprocessing and model made of them at the save, to be made again after it."""
