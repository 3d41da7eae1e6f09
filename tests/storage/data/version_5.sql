BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE hpo_deleted_studies (
	id TEXT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE hpo_imports (
	trial INTEGER NOT NULL, 
	study INTEGER NOT NULL, 
	source TEXT NOT NULL, 
	number INTEGER NOT NULL, 
	role VARCHAR(20) NOT NULL, 
	PRIMARY KEY (trial), 
	UNIQUE (study, source, number)
);
CREATE TABLE hpo_metrics (
	trial INTEGER NOT NULL, 
	epoch INTEGER NOT NULL, 
	name VARCHAR(100) NOT NULL, 
	value DOUBLE, 
	PRIMARY KEY (trial, epoch, name)
);
INSERT INTO "hpo_metrics" VALUES(1,1,'m',0.1);
INSERT INTO "hpo_metrics" VALUES(1,1,'loss',1.0);
INSERT INTO "hpo_metrics" VALUES(1,2,'m',0.2);
INSERT INTO "hpo_metrics" VALUES(1,2,'loss',0.5);
INSERT INTO "hpo_metrics" VALUES(2,1,'m',0.1);
INSERT INTO "hpo_metrics" VALUES(2,1,'loss',1.0);
INSERT INTO "hpo_metrics" VALUES(3,1,'m',0.1);
INSERT INTO "hpo_metrics" VALUES(3,1,'loss',1.0);
INSERT INTO "hpo_metrics" VALUES(4,1,'m',0.1);
INSERT INTO "hpo_metrics" VALUES(4,1,'loss',1.0);
INSERT INTO "hpo_metrics" VALUES(5,1,'m',0.1);
INSERT INTO "hpo_metrics" VALUES(5,1,'loss',1.0);
CREATE TABLE hpo_rungs (
	trial INTEGER NOT NULL, 
	epoch INTEGER NOT NULL, 
	pool VARCHAR(100) NOT NULL, 
	study INTEGER NOT NULL, 
	value DOUBLE NOT NULL, 
	PRIMARY KEY (trial, epoch, pool)
);
CREATE TABLE hpo_runs (
	run INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	study INTEGER NOT NULL, 
	host TEXT NOT NULL, 
	pid INTEGER NOT NULL, 
	process_started FLOAT NOT NULL, 
	started FLOAT NOT NULL, 
	last_heard FLOAT NOT NULL, 
	lease_until FLOAT NOT NULL, 
	ended FLOAT, 
	provenance JSON NOT NULL, 
	takeover_after FLOAT DEFAULT '0' NOT NULL
);
INSERT INTO "hpo_runs" VALUES(1,1,'elsewhere',19312,5.57905999994277954122e+03,1.79589403992800569539e+09,1.79589403995600795744e+09,0.0,NULL,'{"code": "test"}',1.79589405992800569536e+09);
CREATE TABLE hpo_schema (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "hpo_schema" VALUES(5);
CREATE TABLE hpo_trials (
	trial INTEGER NOT NULL, 
	study INTEGER NOT NULL, 
	"key" TEXT NOT NULL, 
	run INTEGER, 
	crashes INTEGER DEFAULT '0' NOT NULL, 
	provenance JSON, 
	token BIGINT, 
	claimed_epoch INTEGER DEFAULT '0' NOT NULL, 
	PRIMARY KEY (trial), 
	UNIQUE (study, "key")
);
INSERT INTO "hpo_trials" VALUES(1,1,'[(''x'', 1)]',1,0,NULL,2479265128017681560,0);
INSERT INTO "hpo_trials" VALUES(2,1,'[(''x'', 2)]',1,0,NULL,4236079583490868322,0);
INSERT INTO "hpo_trials" VALUES(3,1,'[(''x'', 3)]',1,0,NULL,1061955467107364365,0);
INSERT INTO "hpo_trials" VALUES(4,1,'[(''x'', 4)]',1,0,NULL,217453521767800050,0);
INSERT INTO "hpo_trials" VALUES(5,1,'[(''x'', 5)]',1,0,NULL,2361089723381009675,0);
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'s');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MAXIMIZE',1,0);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_system_attributes" VALUES(1,1,'study:metric_names','["m"]');
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_user_attributes" VALUES(1,1,'hpo:settings','{"metric": "m"}');
INSERT INTO "study_user_attributes" VALUES(2,1,'hpo:total','null');
INSERT INTO "study_user_attributes" VALUES(3,1,'hpo:id','"14b79371293e"');
INSERT INTO "study_user_attributes" VALUES(4,1,'hpo:fingerprint','"f"');
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_intermediate_values" VALUES(1,1,1,0.1,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(2,1,2,0.2,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(3,2,1,0.1,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(4,3,1,0.1,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(5,4,1,0.1,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(6,5,1,0.1,'FINITE');
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'x',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 3, 4, 5, 6]}}');
INSERT INTO "trial_params" VALUES(2,2,'x',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 3, 4, 5, 6]}}');
INSERT INTO "trial_params" VALUES(3,3,'x',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 3, 4, 5, 6]}}');
INSERT INTO "trial_params" VALUES(4,4,'x',3.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 3, 4, 5, 6]}}');
INSERT INTO "trial_params" VALUES(5,5,'x',4.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 3, 4, 5, 6]}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,3,'fail_reason','"no"');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,0.2,'FINITE');
INSERT INTO "trial_values" VALUES(2,2,0,0.1,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-28 19:27:19.940783','2026-11-28 19:27:19.977848');
INSERT INTO "trials" VALUES(2,1,1,'PRUNED','2026-11-28 19:27:19.944987','2026-11-28 19:27:19.984551');
INSERT INTO "trials" VALUES(3,2,1,'FAIL','2026-11-28 19:27:19.948897','2026-11-28 19:27:19.986158');
INSERT INTO "trials" VALUES(4,3,1,'RUNNING','2026-11-28 19:27:19.953106',NULL);
INSERT INTO "trials" VALUES(5,4,1,'RUNNING','2026-11-28 19:27:19.957458',NULL);
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE INDEX ix_hpo_runs_study ON hpo_runs (study);
CREATE INDEX ix_hpo_trials_run ON hpo_trials (run);
CREATE UNIQUE INDEX hpo_trials_by_token ON hpo_trials (token);
CREATE INDEX hpo_rungs_by_value ON hpo_rungs (study, pool, epoch, value);
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
CREATE INDEX hpo_trials_by_state ON trials (study_id, state);
CREATE TRIGGER hpo_trial_deleted AFTER DELETE ON trials BEGIN DELETE FROM hpo_metrics WHERE trial = OLD.trial_id; DELETE FROM hpo_rungs WHERE trial = OLD.trial_id; DELETE FROM hpo_imports WHERE trial = OLD.trial_id; DELETE FROM hpo_trials WHERE trial = OLD.trial_id; END;
CREATE TRIGGER hpo_study_deleted AFTER DELETE ON studies BEGIN DELETE FROM hpo_runs WHERE study = OLD.study_id; END;
CREATE TRIGGER hpo_id_deleted AFTER DELETE ON study_user_attributes BEGIN INSERT INTO hpo_deleted_studies (id) SELECT replace(OLD.value_json, '"', '') WHERE OLD.key = 'hpo:id' ON CONFLICT DO NOTHING; END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('hpo_runs',1);
COMMIT;
