"""Make vistok/data/objects from openclipart: small cut-outs of 29 things, for composed scenes.

    python recipes/get_data.py --set clipart DIR
    python recipes/vlm/make_objects.py DIR/clipart [FOLDER]      # default: vistok/data/objects

The drawings are in the public domain (Debian openclipart-png). Each is cut to what is opaque, 96 pixels on its long
side, WebP. The last picture of every thing is held out. `index.jsonl` names the file each was made from.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BUNDLED = Path(__file__).parents[2] / "vistok" / "data" / "objects"
SIDE = 96
THINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "animal": {
        "cat": (
            "animals/mammals/housecats/kitten_gerald_g._01",
            "animals/mammals/housecats/gatto_cat_architetto_fra_01",
            "animals/mammals/housecats/gatto_cat_architetto_fra_02",
            "animals/mammals/housecats/gatto_cat_architetto_fra_04",
            "animals/mammals/housecats/gatto_cat_architetto_fra_03",
        ),
        "dog": (
            "animals/mammals/dogs/beagle_copper_ganson",
            "animals/mammals/dogs/black_lab_ganson",
            "animals/mammals/dog_on_leash_gerald_g._01",
            "animals/mammals/dogs/bored_dog_01",
        ),
        "horse": (
            "animals/mammals/horses/cavallo_architetto_franc_01",
            "animals/mammals/horses/cavallo_architetto_franc_02",
            "animals/mammals/horses/cavallo_architetto_franc_05",
            "animals/mammals/horses/cavallo_architetto_franc_06",
        ),
        "bear": (
            "animals/mammals/bears/orso_architetto_francesc_01",
            "animals/mammals/bears/orso_architetto_francesc_03",
            "animals/mammals/bears/ours_etienne_bersac_r",
            "animals/mammals/bears/orso_architetto_francesc_04",
        ),
        "tiger": (
            "animals/mammals/big_cats/color_tiger_susan_park_01",
            "animals/mammals/big_cats/tigre01_architetto_franc_01",
            "animals/mammals/big_cats/tigre02_architetto_franc_01",
            "animals/mammals/big_cats/tigre05_architetto_franc_01",
            "animals/mammals/big_cats/tigre04_architetto_franc_01",
        ),
        "elephant": (
            "animals/mammals/elefante01_architetto_fr_01",
            "animals/mammals/elephant_01",
            "animals/mammals/elefante02_architetto_fr_01",
        ),
        "frog": (
            "animals/rana01_architetto_france_01",
            "animals/rana02_architetto_france_01",
            "animals/red-eye_frog_mirko_maisc_01",
            "animals/rana03_architetto_france_01",
        ),
        "fish": (
            "animals/fish/brown_fish_01",
            "animals/fish/clown_loach_01",
            "animals/fish/pescetto_arancione_archi_01",
            "animals/fish/giraffe_cichlid_01",
            "animals/fish/yellow_gourami_01",
        ),
        "butterfly": (
            "animals/bugs/butterfly_jonathan_dietr_01",
            "animals/bugs/butterfly_jonvdveen_01",
            "animals/bugs/farfalla_semplice_archit_01",
            "animals/bugs/farfalla_butterfly_fra1",
        ),
        "bee": (
            "animals/bugs/bee",
            "animals/bugs/bee1_mimooh_01",
            "animals/bugs/bee3_mimooh_01",
        ),
        "penguin": (
            "animals/birds/emperor_penguin_ralf_ste_01",
            "animals/birds/new_penguin_charles_mcco_01",
            "animals/birds/baby_tux_01",
            "animals/birds/penguin/plush_tux_anita_01",
        ),
        "monkey": (
            "animals/mammals/angry_monkey_benji_park_01",
            "animals/mammals/happy_monkey_benji_park_01",
            "animals/sailor_monkey_nicu_bucul_01",
            "animals/mammals/monkey_head_nicu_buculei_01",
        ),
    },
    "fruit": {
        "apple": (
            "food/fruit/an_apple_01",
            "food/fruit/another_apple_01",
            "food/fruit/apple",
            "food/fruit/applf",
        ),
        "orange": (
            "food/fruit/orange",
            "food/fruit/orange_dave_pena_01",
            "food/fruit/orange_simple",
        ),
        "pear": (
            "food/fruit/green_pear_01",
            "food/fruit/pear",
            "food/fruit/pear_simple",
        ),
        "lemon": (
            "food/fruit/lemon",
            "food/fruit/lemon_simple",
            "food/fruit/lemon_whole_ganson",
        ),
        "strawberry": (
            "food/fruit/strawberry",
            "food/fruit/strawberry_01",
            "food/fruit/strawberry_jonathan_diet_01",
        ),
        "grapes": (
            "food/fruit/grape_01",
            "food/fruit/grapes_01",
            "food/fruit/grapes_simple",
        ),
    },
    "vehicle": {
        "car": (
            "transportation/car_jamin_ellis_",
            "transportation/skoda_car_alejandro_teja_",
            "transportation/hummer_03",
            "transportation/vehicles/car",
        ),
        "bus": (
            "transportation/bus1_jarno_vasamaa_01",
            "transportation/bus2_jarno_vasamaa_01",
        ),
        "truck": (
            "transportation/small_truck_steffen_gluc_01",
            "transportation/truck_jarno_vasamaa1",
            "transportation/truck_jarno_vasamaa_",
        ),
        "plane": (
            "transportation/vehicles/aircraft_jarno_vasamaa1",
            "transportation/vehicles/aircraft_jarno_vasamaa2",
            "transportation/vehicles/aircraft_jarno_vasamaa4",
            "transportation/vehicles/aircraft_jarno_vasamaa_",
        ),
        "bicycle": (
            "transportation/vehicles/vtt_02",
            "transportation/vehicles/bicycle_01",
        ),
        "boat": (
            "transportation/boating/boat_jarno_vasamaa1",
            "transportation/boating/boat_jarno_vasamaa_",
            "transportation/vehicles/trawler_01",
        ),
    },
    "instrument": {
        "guitar": (
            "recreation/music/guitar_jarno_vasamaa1",
            "recreation/music/guitar_profile_philippe__01",
            "recreation/music/guitar_jarno_vasamaa2",
        ),
        "violin": (
            "recreation/music/violin_colour_ganson",
            "recreation/music/cello_ganson",
        ),
        "drum": (
            "recreation/music/africandrum_benji_park1",
            "recreation/music/africandrum_benji_park_",
            "recreation/music/djambf_ganson",
        ),
        "trumpet": (
            "recreation/music/trumpet_pocket_colour_ganso",
            "recreation/music/trumpet_b_flat_colour_ganso",
        ),
        "harp": (
            "recreation/music/harp1_ganson",
            "recreation/music/harp2_ganson",
        ),
    },
}


def main(clipart: Path, folder: Path) -> None:
    """Cut, shrink and save every picture, and write the index."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for category, things in THINGS.items():
        for name, sources in things.items():
            for i, source in enumerate(sources):
                with Image.open(clipart / f"{source}.png") as opened:
                    picture = opened.convert("RGBA")
                opaque = picture.getchannel("A").point(lambda a: 255 * (a > 24))
                picture = picture.crop(opaque.getbbox())
                picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                file = f"{name}-{i + 1}.webp"
                picture.save(folder / file, quality=85, method=6)
                row = {"file": file, "name": name, "category": category, "held_out": i == len(sources) - 1}
                rows.append(row | {"source": f"openclipart-png: {source}.png", "licence": "public domain"})
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {len(rows)} pictures of {sum(map(len, THINGS.values()))} things, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else BUNDLED)
