"""Which results the overlays show."""

from pais_ray.inference.predictor import TOP_DRAWN, select_drawn


def results(*scores: float, image_id: int = 1) -> list[dict]:
    return [{"image_id": image_id, "score": score} for score in scores]


def test_results_from_the_threshold_on_are_drawn():
    drawn = select_drawn([*results(0.9, 0.5, 0.4), *results(0.3, image_id=2)], 0.5)
    assert drawn == {1: results(0.9, 0.5), 2: []}


def test_the_best_of_each_image_are_drawn_if_no_image_reaches_the_threshold():
    drawn = select_drawn([*results(0.1, 0.4, 0.3, 0.2), *results(0.05, image_id=2)], 0.5)
    assert drawn == {1: results(0.4, 0.3, 0.2), 2: results(0.05, image_id=2)}
    assert len(drawn[1]) == TOP_DRAWN
