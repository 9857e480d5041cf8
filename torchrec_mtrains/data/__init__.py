"""Training data for the main job: calibrated synthetic, MovieLens (RecBole's ``.inter``) and Criteo's Kaggle TSV."""
